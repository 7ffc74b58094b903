"""Golden numbers of outer-product mixers from the plain PyTorch functions of flash-linear-attention.

Those functions begin behind the projections, whose layers need a GPU; they are written out here as the papers
and fla/layers have them. float32 on the CPU.

python tests/golden/make_fla_outer.py [NAME ...]    # pip install fla-core==0.6.0 triton==3.6.0, torch 2.13.0
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from fla.ops.based.naive import naive_parallel_based
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.gsa.naive import naive_recurrent_gsa
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.log_linear_attn.naive import naive_log_linear_attn
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

from riverrun.testing import golden

WIDTH, STEPS, HEADS = 16, 70, 2


def matrix(out, width=WIDTH):
    return torch.randn(out, width) * width**-0.5


def split(x, heads=HEADS):
    """(B, T, H·P) -> (B, H, T, P), the layout of most of those functions."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


def rms(x, weight, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rwkv6(x):
    """The names are those of the authors' code, RWKV-LM/RWKV-v6."""
    R, K = 3, WIDTH // HEADS
    w = {f"time_maa_{i}": torch.rand(WIDTH) for i in "xwkvrg"}
    w |= {"time_maa_w1": matrix(5 * R), "time_maa_w2": torch.randn(5, R, WIDTH) * 0.3}
    w |= {"time_decay": torch.randn(WIDTH), "time_faaaa": torch.randn(HEADS, K)}
    w |= {"time_decay_w1": matrix(R), "time_decay_w2": torch.randn(WIDTH, R)}
    w |= {f"{i}.weight": matrix(WIDTH) for i in ("receptance", "key", "value", "gate", "output")}
    w |= {"ln_x.weight": 1 + 0.3 * torch.randn(WIDTH), "ln_x.bias": torch.randn(WIDTH)}
    d = F.pad(x, (0, 0, 1, -1)) - x
    low = torch.tanh((x + d * w["time_maa_x"]) @ w["time_maa_w1"].T).unflatten(-1, (5, R))
    mixed = {}
    for i, name in enumerate("wkvrg"):
        mixed[name] = x + d * (w[f"time_maa_{name}"] + low[..., i, :] @ w["time_maa_w2"][i])
    r, k, v = (
        split(mixed[i] @ w[f"{name}.weight"].T) for i, name in zip("rkv", ("receptance", "key", "value"))
    )
    decay = w["time_decay"] + torch.tanh(mixed["w"] @ w["time_decay_w1"].T) @ w["time_decay_w2"].T
    y, S = naive_recurrent_rwkv6(
        r, k, v, -split(decay).exp(), w["time_faaaa"], scale=1.0, output_final_state=True
    )
    y = F.group_norm(join(y).flatten(0, 1), HEADS, w["ln_x.weight"], w["ln_x.bias"], 1e-5 * K).view_as(x)
    y = (y * F.silu(mixed["g"] @ w["gate.weight"].T)) @ w["output.weight"].T
    return y, w, {"S": S, "last": x[:, -1]}, dict(num_heads=HEADS, mix_rank=R, decay_rank=R)


def based(x):
    """The names are those of fla/layers/based.py."""
    d = 3
    w = {"q_proj.weight": 2 * matrix(HEADS * d), "k_proj.weight": 2 * matrix(HEADS * d)}
    w |= {"v_proj.weight": matrix(WIDTH), "o_proj.weight": matrix(WIDTH)}
    q, k, v = (split(x @ w[f"{i}_proj.weight"].T) for i in "qkv")
    y = join(naive_parallel_based(q, k, v)) @ w["o_proj.weight"].T
    return y, w, {}, dict(num_heads=HEADS, feature_width=d)


def hgrn(x):
    """The version without complex numbers; the names are those of fla/layers/hgrn.py."""
    w, bound = {f"{i}_proj.weight": matrix(WIDTH) for i in "ifgo"}, 0.3
    w["g_norm.weight"] = 1 + 0.3 * torch.randn(WIDTH)
    i, f, z = (x @ w[f"{j}_proj.weight"].T for j in "ifg")
    f = bound + (1 - bound) * f.sigmoid()
    h, last = naive_recurrent_hgrn(F.silu(i) * (1 - f), f.log(), output_final_state=True)
    y = (rms(h, w["g_norm.weight"]) * F.silu(z)) @ w["o_proj.weight"].T
    return y, w, {"h": last}, dict(lower_bound=bound, rotate=False)


def gsa(x):
    """The names are those of fla/layers/gsa.py."""
    slots, temperature = 5, 8.0
    w = {f"{i}_proj.weight": 2 * matrix(WIDTH) for i in "qkvo"}
    w |= {"f_proj.weight": 3 * matrix(HEADS * slots), "g_norm.weight": 1 + 0.3 * torch.randn(WIDTH)}
    q, k, v, f = ((x @ w[f"{i}_proj.weight"].T).unflatten(-1, (HEADS, -1)) for i in "qkvf")
    g = F.logsigmoid(f) / temperature
    y, (K, V) = naive_recurrent_gsa(
        F.silu(q), F.silu(k), F.silu(v), 1 - g.exp(), g, scale=1.0, output_final_state=True
    )
    y = rms(F.silu(y).flatten(2), w["g_norm.weight"]) @ w["o_proj.weight"].T
    return y, w, {"K": K, "V": V}, dict(num_heads=HEADS, num_slots=slots, temperature=temperature)


def lightnet(x):
    """Without position codes; the names are those of fla/layers/lightnet.py, whose keys are summed here."""
    w = {f"{i}_proj.weight": 2 * matrix(WIDTH) for i in "qkvo"}
    w |= {"g_proj.0.weight": matrix(3), "g_proj.1.weight": torch.randn(WIDTH, 3)}
    w["g_norm.weight"] = 1 + 0.3 * torch.randn(WIDTH)
    q, k, v = ((x @ w[f"{i}_proj.weight"].T).unflatten(-1, (HEADS, -1)) for i in "qkv")
    z = k.logcumsumexp(1)
    g = torch.cat([z[:, :1], z[:, :-1]], 1) - z
    y, S = naive_recurrent_gla(F.silu(q), (k - z).exp(), v, g, output_final_state=True)
    gate = F.silu(x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T)
    y = (rms(y.flatten(2), w["g_norm.weight"]) * gate) @ w["o_proj.weight"].T
    return (
        y,
        w,
        {"S": S, "z": z[:, -1], "position": torch.full((len(x),), STEPS)},
        dict(num_heads=HEADS, rank=3, base=None),
    )


def loglinear(x):
    """The names are those of fla/layers/log_linear_mamba2.py; g_norm has one group for each group of keys."""
    G, N, H, L, E = 1, 3, 4, 9, 2 * WIDTH
    parts, inner = (E, E + 2 * G * N, H, H * L), (E, G * N, G * N)
    w = {"in_proj.weight": 2 * matrix(sum(parts)), "out_proj.weight": matrix(WIDTH, E)}
    w |= {"conv1d.weight": torch.randn(parts[1], 1, 4) * 0.5, "conv1d.bias": torch.randn(parts[1])}
    w |= {"dt_bias": torch.randn(H) - 3, "A_log": torch.randn(H), "L": torch.randn(H, L), "D": torch.randn(H)}
    w["norm.weight"] = 1 + 0.3 * torch.randn(E)
    z, u, dt, level = (x @ w["in_proj.weight"].T).split(parts, -1)
    conv = F.conv1d(u.mT, w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=parts[1])[..., :STEPS]
    v, B, C = F.silu(conv).mT.split(inner, -1)
    v, B, C = v.unflatten(-1, (H, -1)), B.unflatten(-1, (G, -1)), C.unflatten(-1, (G, -1))
    B, C, dt = (B.repeat_interleave(H // G, 2), C.repeat_interleave(H // G, 2), F.softplus(dt + w["dt_bias"]))
    weight = F.softplus(w["L"] * level.unflatten(-1, (H, L)))
    y = naive_log_linear_attn(C, B, v * dt[..., None], -w["A_log"].exp() * dt, weight) + w["D"][:, None] * v
    y = rms(y.flatten(2) * F.silu(z), w["norm.weight"], 1e-5) @ w["out_proj.weight"].T
    return y, w, {}, dict(num_heads=H, num_states=N, num_groups=G, num_levels=L)


LAYERS = {f.__name__: f for f in (rwkv6, based, hgrn, gsa, lightnet, loglinear)}


def main() -> None:
    for name in sys.argv[1:] or LAYERS:
        torch.manual_seed(0)
        x = torch.randn(2, STEPS, WIDTH)
        y, weights, state, args = LAYERS[name](x)
        path = Path(__file__).parent / f"{name}.safetensors"
        golden.save(path, x, y, weights, state, args, "fla-core", version("fla-core"))


if __name__ == "__main__":
    main()
