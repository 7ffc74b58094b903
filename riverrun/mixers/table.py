"""The table of mixers: one row each, and nothing but strings until somebody builds one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One mixer: where it is, what it stands on, and what may be promised of it."""

    cls: str
    arxiv: str  # the paper whose equations it follows; "" for what is older than arXiv
    op: str  # the recurrence under it, a name in riverrun.ops.OPS, or "" when it stands on none
    causal: bool = True
    state: str = "constant"  # its bytes against T: "constant", "window", "grows" or "none"
    # arguments of the instance that the laws build at width 16
    small: dict[str, Any] = field(default_factory=dict)
    breaks: dict[str, str] = field(default_factory=dict)  # law -> why it does not hold; such a law must fail
    golden: str = ""  # a file in tests/golden, or the reason why there is none
    compiles: bool = True  # torch.compile(fullgraph=True) takes it
    good: str = ""  # "good at ..., bad at ...": a reader's first choice among mixers
    bad: str = ""
    slow: str = ""  # why it takes more than three times as long as its op alone, if it does


BY_EQUATION = "its equation in float64 stands in tests/test_mixers.py: "

MIXERS: dict[str, Row] = {
    "attention": Row(
        "Attention",
        "1706.03762",
        op="",
        state="grows",
        small=dict(num_heads=4, num_key_heads=2),
        golden=BY_EQUATION + "masked softmax over all pairs",
        good="exact recall of anything in the context",
        bad="long contexts: its cache and its time per token grow with them",
    ),
    "based": Row(
        "Based",
        "2402.18668",
        op="outer",
        small=dict(num_heads=2, feature_width=3),
        golden="based.safetensors",
        good="recall from a large state, beside attention in a small window",
        bad="anything local without that window",
    ),
    "deltanet": Row(
        "DeltaNet",
        "2406.06484",
        op="delta",
        small=dict(num_heads=2, negative_eigenvalues=True),
        golden=BY_EQUATION + "the authors' code runs on GPUs only",
        good="overwriting what a key held, so recalling more pairs than sums do",
        bad="forgetting what no later key overwrites",
    ),
    "gated_deltanet": Row(
        "GatedDeltaNet",
        "2412.06464",
        op="delta",
        small=dict(num_heads=4, num_key_heads=2, key_width=6),
        golden="gated_deltanet.safetensors",
        good="language: it overwrites by key and forgets by gate",
        bad="exact recall past what its state holds",
    ),
    "gla": Row(
        "GLA",
        "2312.06635",
        op="outer",
        small=dict(num_heads=2, rank=4),
        golden=BY_EQUATION + "the authors' code runs on GPUs only",
        good="forgetting each key's row at its own rate",
        bad="recall, against delta rules with the same state",
    ),
    "gru": Row(
        "GRU",
        "1406.1078",
        op="gru",
        small=dict(num_heads=2),
        golden="gru.safetensors",
        good="tracking any state, nonlinearly, step by step",
        bad="parallel training, and memory per parameter",
    ),
    "gsa": Row(
        "GSA",
        "2409.07146",
        op="outer",
        small=dict(num_heads=2, num_slots=5),
        golden="gsa.safetensors",
        good="recall from few slots, and taking over the weights of a softmax model",
        bad="speed: its memory is walked through twice",
    ),
    "hgrn": Row(
        "HGRN",
        "2311.04823",
        op="diagonal",
        small=dict(lower_bound=0.2),
        golden="hgrn.safetensors",
        good="long memory with a vector for a state: its floor keeps upper layers from forgetting",
        bad="recall: one number a channel",
    ),
    "hgrn2": Row(
        "HGRN2",
        "2404.07904",
        op="outer",
        small=dict(num_heads=2, lower_bound=0.2),
        golden=BY_EQUATION + "the authors' code runs on GPUs only",
        good="doing with few parameters: the forget gate is the key",
        bad="recall, which that tie costs",
    ),
    "lact": Row(
        "LaCT",
        "2505.23884",
        op="fastweight",
        state="window",
        small=dict(num_heads=2, num_memories=2, window=8, chunk=8),
        golden=BY_EQUATION + "the authors' layer needs FlashAttention and steps in bfloat16",
        compiles=False,  # with resets: how many chunks there are is data,
        good="a large nonlinear memory in few large matrix products",
        bad="what lies inside a chunk: its window must cover that",
    ),
    "linear_attention": Row(
        "LinearAttention",
        "2006.16236",
        op="outer",
        small=dict(num_heads=2),
        golden=BY_EQUATION + "the authors' package compiles at install",
        good="being the plainest and cheapest matrix memory",
        bad="long inputs: it never forgets, so they blur",
    ),
    "lstm": Row(
        "LSTM",
        "",
        op="lstm",
        small=dict(num_heads=2),
        golden="lstm.safetensors",
        good="tracking any state step by step and holding values long",
        bad="parallel training",
    ),
    "mamba": Row(
        "Mamba",
        "2312.00752",
        op="selective",
        small=dict(num_states=4),
        golden="mamba.safetensors",
        good="dense signals and language with a small state for each channel",
        bad="recall of many pairs",
        slow="only with negative_eigenvalues, which store every state for want of an op of their own",
    ),
    "mamba2": Row(
        "Mamba2",
        "2405.21060",
        op="outer",
        small=dict(num_heads=4, num_states=3, num_groups=2, step_limits=(0.01, 0.5)),
        golden="mamba2.safetensors",
        good="a larger state than Mamba's at the speed of matrix products",
        bad="recall once the context outgrows the state",
    ),
    "mingru": Row(
        "MinGRU",
        "2410.01201",
        op="diagonal",
        golden="mingru.safetensors",
        good="being the cheapest gated memory",
        bad="tracking states: its gates see only the input",
    ),
    "miras": Row(
        "Miras",
        "2504.13173",
        op="fastweight",
        small=dict(num_heads=2, chunk=8, expand=2),
        golden=BY_EQUATION + "the authors published no code",
        compiles=False,  # with resets: how many chunks there are is data,
        good="memories with a loss and a retention of choice, robust to outliers",
        bad="speed, against matrix memories",
    ),
    "mlstm": Row(
        "MLSTM",
        "2405.04517",
        op="mlstm",
        small=dict(num_heads=2),
        golden="mlstm.safetensors",
        good="letting a late, important token outweigh all earlier ones",
        bad="tracking states, as all sums are",
    ),
    "retnet": Row(
        "RetNet",
        "2307.08621",
        op="outer",
        small=dict(num_heads=2),
        golden=BY_EQUATION + "the authors' package needs an old PyTorch",
        good="simplicity and smooth extrapolation in length",
        bad="choosing what to keep: its decays are fixed",
    ),
    "rwkv6": Row(
        "RWKV6",
        "2404.05892",
        op="outer",
        small=dict(num_heads=2, mix_rank=3, decay_rank=4),
        golden="rwkv6.safetensors",
        good="language by sums: each key forgets at a rate the input chooses",
        bad="overwriting: a key's old value can only fade",
    ),
    "rwkv7": Row(
        "RWKV7",
        "2503.14456",
        op="dplr",
        small=dict(num_heads=2, decay_rank=4, rate_rank=4, gate_rank=4),
        golden="rwkv7.safetensors",
        good="tracking states that gates cannot: it removes and writes at separate keys",
        bad="cost per step",
    ),
    "s5": Row(
        "S5",
        "2208.04933",
        op="diagonal",
        small=dict(num_states=4),
        golden=BY_EQUATION + "the exponential of the whole matrix, conjugates included",
        good="continuous signals and very long ranges",
        bad="selecting by content: its dynamics are fixed",
    ),
    "mom": Row(
        "MoM",
        "2502.13685",
        op="delta",
        small=dict(num_heads=2, num_memories=3, chosen=2),
        golden=BY_EQUATION + "the authors' layer runs on GPUs only",
        compiles=False,  # unless masked: how many tokens a memory gets is data,
        good="recall: tokens that would disturb each other go to memories of their own",
        bad="speed: tokens are sorted into their memories, and out again",
    ),
    "sliding_window": Row(
        "SlidingWindow",
        "2004.05150",
        op="",
        state="window",
        small=dict(num_heads=4, num_key_heads=2, window=8),
        golden=BY_EQUATION + "masked softmax over all pairs",
        good="exact recall inside its window, beside a recurrent layer",
        bad="everything beyond it",
    ),
    "slstm": Row(
        "SLSTM",
        "2405.04517",
        op="slstm",
        small=dict(num_heads=2),
        golden=BY_EQUATION + "the authors' kernels run on GPUs only",
        good="nonlinear state tracking with gates that can be revised",
        bad="parallel training, and holding many values",
    ),
    "titans": Row(
        "Titans",
        "2501.00663",
        op="fastweight",
        state="window",
        small=dict(num_heads=2, window=8, chunk=8, persistent=2, expand=2),
        golden=BY_EQUATION + "the authors published no code",
        compiles=False,  # with resets: how many chunks there are is data,
        good="a deep memory that learns while it reads, with momentum and forgetting",
        bad="cost per step",
    ),
    "ttt": Row(
        "TTT",
        "2407.04620",
        op="fastweight",
        small=dict(num_heads=2, chunk=8),
        golden=BY_EQUATION + "the authors' step also depends on a token's place in its chunk",
        compiles=False,  # with resets: how many chunks there are is data,
        good="memories trained by gradient steps while they read, linear or a network",
        bad="what lies inside a chunk",
    ),
}
    "sse": Row(
        "SSE",
        "2507.16577",
        op="outer",
        small=dict(num_heads=2, num_partitions=3, writers=2, readers=1, rank=4, decay_rank=4),
        golden=BY_EQUATION + "the authors' layer runs on GPUs only",
        compiles=False,  # unless masked: how many tokens a partition gets is data,
        good="a state that grows without parameters and without work per token",
        bad="speed: tokens are sorted into their partitions, and out again",
    ),
