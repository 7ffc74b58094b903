"""Golden numbers of comba, deltaproduct and mesanet from the definitions in flash-linear-attention's ops, in
float32 on the CPU. Its layers run on GPUs only, so what they do before and after the op is done here.

python tests/golden/make_fla_delta.py
    # pip install fla-core==0.6.0 triton==3.9.0 einops==0.8.2 transformers==5.23.0, with torch 2.13.0
"""

from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from fla.ops.comba.naive import naive_chunk_comba
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.mesa_net.naive import naive_mesa_net_exact

from riverrun.testing import golden

FOLDER = Path(__file__).parent
WIDTH, STEPS, HEADS, KEY, VALUE, TAPS = 16, 70, 2, 6, 8, 4  # past a chunk of 64


def weights(**sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random weights; matrices are scaled by their inputs."""
    return {
        name: torch.randn(*size) * (size[-1] ** -0.5 if len(size) == 2 else 1) for name, size in sizes.items()
    }


def convolved(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The layers' depthwise convolution, w (channels, 1, taps), and SiLU."""
    return F.silu(F.conv1d(F.pad(x.mT, (TAPS - 1, 0)), w, groups=len(w))).mT


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return w * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def heads(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    return x.unflatten(-1, sizes)


def decay(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return -w["A_log"].exp() * F.softplus(x @ w["a_proj"].T + w["dt_bias"])


def write(name: str, x, y, w, state, args) -> None:
    taken = [x[:, 1 - TAPS :] @ w[f"{i}_proj"].T for i in "qkv" if f"{i}_conv1d" in w]
    state["conv"] = torch.cat(taken, -1)
    golden.save(FOLDER / f"{name}.safetensors", x, y, w, state, args, "fla-core", version("fla-core"))


def comba() -> None:
    """`p`, the key that the state is read with, keeps its length d, which the layer's norm takes away."""
    keys, values = HEADS * KEY, HEADS * VALUE
    w = weights(
        q_proj=(keys, WIDTH), k_proj=(keys, WIDTH), v_proj=(values, WIDTH), a_proj=(HEADS, WIDTH),
        b_proj=(HEADS, WIDTH), g_proj=(values, WIDTH), o_proj=(WIDTH, values), q_conv1d=(keys, 1, TAPS),
        k_conv1d=(keys, 1, TAPS), v_conv1d=(values, 1, TAPS), decay=(HEADS,), D=(HEADS,), A_log=(HEADS,),
        dt_bias=(HEADS,), o_norm=(VALUE,),
    )  # fmt: skip
    x = torch.randn(2, STEPS, WIDTH)
    q, k, v = (convolved(x @ w[f"{i}_proj"].T, w[f"{i}_conv1d"]) for i in "qkv")
    q, k, v = heads(q, HEADS, KEY), heads(k, HEADS, KEY), heads(v, HEADS, VALUE)
    d = w["decay"].sigmoid()[:, None]
    q = q - w["D"][:, None] * d * k
    beta = (x @ w["b_proj"].T).sigmoid()
    y, S = naive_chunk_comba(unit(q), unit(k), v, d * unit(k), decay(w, x), beta, output_final_state=True)
    y = rms(y, w["o_norm"]) * heads(x @ w["g_proj"].T, HEADS, VALUE).sigmoid()
    args = dict(num_heads=HEADS, key_width=KEY, value_width=VALUE)
    write("comba", x, y.flatten(2) @ w["o_proj"].T, w, {"S": S}, args)


def deltaproduct(n: int = 3) -> None:
    keys, values = HEADS * KEY, HEADS * VALUE
    w = weights(
        q_proj=(keys, WIDTH), k_proj=(n * keys, WIDTH), v_proj=(n * values, WIDTH), a_proj=(HEADS, WIDTH),
        b_proj=(n * HEADS, WIDTH), g_proj=(values, WIDTH), o_proj=(WIDTH, values), q_conv1d=(keys, 1, TAPS),
        k_conv1d=(n * keys, 1, TAPS), v_conv1d=(n * values, 1, TAPS), A_log=(HEADS,), dt_bias=(HEADS,),
        o_norm=(VALUE,),
    )  # fmt: skip
    x = torch.randn(2, STEPS, WIDTH)
    q, k, v = (convolved(x @ w[f"{i}_proj"].T, w[f"{i}_conv1d"]) for i in "qkv")
    q, k, v = heads(q, HEADS, KEY), heads(k, n, HEADS, KEY), heads(v, n, HEADS, VALUE)
    beta = heads(2 * (x @ w["b_proj"].T).sigmoid(), n, HEADS)
    k, v, beta = (p.flatten(1, 2) for p in (k, v, beta))
    y, S = naive_recurrent_gated_delta_product(
        unit(q), unit(k), v, decay(w, x), beta, KEY**-0.5, num_householder=n
    )
    y = rms(y, w["o_norm"]) * F.silu(heads(x @ w["g_proj"].T, HEADS, VALUE))
    args = dict(num_heads=HEADS, num_steps=n, key_width=KEY, value_width=VALUE, eps=1e-5)
    write("deltaproduct", x, y.flatten(2) @ w["o_proj"].T, w, {"S": S}, args)


def mesanet() -> None:
    """The exact solution in place of conjugate gradients, which are to reach it."""
    w = weights(
        q_proj=(WIDTH, WIDTH), k_proj=(WIDTH, WIDTH), v_proj=(WIDTH, WIDTH), a_proj=(HEADS, WIDTH),
        b_proj=(HEADS, WIDTH), o_proj=(WIDTH, WIDTH), q_conv1d=(WIDTH, 1, TAPS), k_conv1d=(WIDTH, 1, TAPS),
        a_bias=(HEADS,), b_bias=(HEADS,), lambda_params=(WIDTH,), o_norm=(WIDTH // HEADS,),
    )  # fmt: skip
    x = torch.randn(2, STEPS, WIDTH)
    q, k = (unit(heads(convolved(x @ w[f"{i}_proj"].T, w[f"{i}_conv1d"]), HEADS, -1)) for i in "qk")
    g, beta = F.logsigmoid(x @ w["a_proj"].T + w["a_bias"]), (x @ w["b_proj"].T + w["b_bias"]).sigmoid()
    ridge = heads(F.softplus(w["lambda_params"]) + 0.25, HEADS, -1)
    y, kk, kv = naive_mesa_net_exact(q, k, heads(x @ w["v_proj"].T, HEADS, -1), g, ridge, beta)
    y = rms(y, w["o_norm"]).flatten(2) @ w["o_proj"].T
    write("mesanet", x, y, w, {"kk": kk, "kv": kv}, dict(num_heads=HEADS))


if __name__ == "__main__":
    torch.manual_seed(0)
    for make in (comba, deltaproduct, mesanet):
        make()
