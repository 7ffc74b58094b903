"""Golden numbers of a whole RWKV-7 of three layers from rwkv7-hf, in float32 on the CPU.

python tests/golden/make_rwkv7_model.py   # pip install rwkv7-hf==0.9.0 transformers==5.23.0, torch 2.13.0
"""

from importlib.metadata import version
from pathlib import Path

import torch
from rwkv7_hf.configuration_rwkv7 import RWKV7Config
from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

from riverrun.testing import golden

VOCABULARY, WIDTH, STEPS, HEADS, INNER = 20, 16, 40, 2, 24


def main() -> None:
    torch.manual_seed(0)
    config = RWKV7Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_heads=HEADS, num_hidden_layers=3,
        intermediate_size=INNER, decay_low_rank_dim=5, a_low_rank_dim=5, v_low_rank_dim=3,
        gate_low_rank_dim=7,
    )  # fmt: skip
    model = RWKV7ForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".x_" in name:
                p.copy_(torch.rand_like(p))
            elif p.dim() > 1 and "r_k" not in name:
                p.copy_(torch.randn_like(p) * WIDTH**-0.5)
            elif "bias" in name:
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_(1 + 0.3 * torch.randn_like(p))
        tokens = torch.randint(1, VOCABULARY, (2, STEPS))
        found = model(tokens, use_cache=True)
    cache = found.past_key_values
    state = {}
    for i in range(3):
        state |= {
            f"{i}.S": cache.recurrent_state[i],
            f"{i}.last": cache.attention_shift[i],
            f"{i}.channel": cache.ffn_shift[i],
        }
    path = Path(__file__).parent / "models" / "rwkv7.safetensors"
    args = dict(
        vocabulary=VOCABULARY, width=WIDTH, depth=3, num_heads=HEADS, inner=INNER, decay_rank=5, rate_rank=5,
        value_rank=3, gate_rank=7,
    )  # fmt: skip
    weights = dict(model.named_parameters())
    golden.save(path, tokens, found.logits, weights, state, args, "rwkv7-hf", version("rwkv7-hf"))


if __name__ == "__main__":
    main()
