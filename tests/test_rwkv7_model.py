"""The whole RWKV-7 against somebody else's, and that it keeps what every model of ours promises."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_golden import rwkv7

from riverrun.mixers.rwkv7 import RWKV7
from riverrun.models.rwkv7 import RWKV7Config, RWKV7Model
from riverrun.state import leaves, nbytes
from riverrun.testing import golden
from riverrun.testing.golden import BOUND
from riverrun.testing.tolerance import close, close_all, close_states
from riverrun.training.loss import cross_entropy

FILE = Path(__file__).parent / "golden" / "models" / "rwkv7.safetensors"
NORMS = {"attn_norm": "time_norm", "ffn_norm": "channel_norm"}


def layer(g, i):
    """Parameters and state of layer i, by our names."""

    def own(values, prefix):
        return {name.removeprefix(prefix): x for name, x in values.items() if name.startswith(prefix)}

    w, state = own(g.weights, f"model.layers.{i}."), own(g.state, f"{i}.")
    time, last = rwkv7(replace(g, weights=own(w, "attn."), state=state))
    if i:
        lora = own(w, "attn.v_lora.lora.")
        time |= {"value.inp.weight": lora["0.weight"]}
        time |= {"value.out.weight": lora["2.weight"], "value.out.bias": lora["2.bias"]}
    parameters = {f"time.{name}": x for name, x in time.items()}
    for theirs, ours in {"x_k": "mix", "key.weight": "key.weight", "value.weight": "out.weight"}.items():
        parameters |= {f"channel.{ours}": w[f"ffn.{theirs}"]}
    for theirs, ours in NORMS.items():
        parameters |= {f"{ours}.{part}": w[f"{theirs}.{part}"] for part in ("weight", "bias")}
    return parameters, (last, state["channel"])


@pytest.fixture
def published():
    g = golden.load(FILE)
    model, w, states = RWKV7Model(RWKV7Config(**g.args)).double(), g.weights, []
    parameters = {"embedding.weight": w["model.embeddings.weight"], "head.weight": w["lm_head.weight"]}
    for ours, theirs in (("first_norm", "layers.0.pre_norm"), ("norm", "norm")):
        parameters |= {f"{ours}.{part}": w[f"model.{theirs}.{part}"] for part in ("weight", "bias")}
    for i in range(g.args["depth"]):
        own, state = layer(g, i)
        parameters |= {f"blocks.{i}.{name}": x for name, x in own.items()}
        states.append(state)
    model.load_state_dict({name: x.double() for name, x in parameters.items()})
    return model, g, tuple(states)


def test_a_published_model_gives_the_same_logits_and_states(published):
    model, g, states = published
    tokens = g.x.long()
    with torch.no_grad():
        logits, end = model(tokens)
        first, middle = model(tokens[:, :17])
        second, last = model(tokens[:, 17:], middle)
    close(logits, g.y.double(), f"against {g.source}", BOUND)
    close(torch.cat([first, second], 1), g.y.double(), f"in two calls, against {g.source}", BOUND)
    for found in (end, last):
        close_states(found, states, f"against {g.source}", BOUND)


def test_the_first_layers_values_matter(published):
    model, g, _ = published
    with torch.no_grad():
        model.blocks[1].time.value.out.bias.sub_(50)  # σ = 0: each layer its own
        y = model(g.x.long())[0]
    assert (y - g.y).abs().max() > 1e-2


def test_documents_steps_and_rows(published):
    model, g, _ = published
    tokens = g.x.long()
    reset = torch.zeros(tokens.shape, dtype=torch.bool)
    reset[0, 11], reset[1, 30] = True, True
    with torch.no_grad():
        packed, end = model(tokens, None, reset)
        for row, cut in ((0, 11), (1, 30)):
            pieces = [model(tokens[row : row + 1, part])[0] for part in (slice(cut), slice(cut, None))]
            close(packed[row : row + 1], torch.cat(pieces, 1), f"row {row}")
        state, ys = None, []
        for t in range(12):
            y, state = model(tokens[:, t : t + 1], state)
            ys.append(y)
        close(torch.cat(ys, 1), model(tokens[:, :12])[0], "step by step")
    assert nbytes(end) == nbytes(state)


def test_every_parameter_learns_and_the_state_has_gradients():
    torch.manual_seed(0)
    model = RWKV7Model(RWKV7Config(20, 16, 3, 2, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4))
    tokens = torch.randint(20, (2, 18))
    _, state = model(tokens[:, :4])
    x, _ = model.hidden(tokens[:, 4:-1], state)
    cross_entropy(x, model.output, tokens[:, 5:]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = tuple(tuple(part) for part in state)
    close(compiled(tokens, given)[0], model(tokens, given)[0], "compiled", 1e-5)  # sums in another order


def test_what_does_not_fit_is_refused():
    config = RWKV7Config(20, 16, 2, 2)
    model, tokens = RWKV7Model(config), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="of 2 layers"):
        model(tokens, model(tokens)[1][:1])
    with pytest.raises(ValueError, match="state"):
        model(tokens.expand(2, 3), model(tokens)[1])
    for name, wrong in dict(depth=0, vocabulary=None, inner=-1, num_heads="two").items():
        with pytest.raises(ValueError, match=rf"{name} is {wrong!r}; it must be int"):
            RWKV7Model(replace(config, **{name: wrong}))
    with pytest.raises(ValueError, match="value_rank"):
        RWKV7(16, 2, value_rank=4)(torch.zeros(1, 1, 16))
    close_all(leaves(model(tokens)[1]), leaves(model(tokens)[1]), "twice")
