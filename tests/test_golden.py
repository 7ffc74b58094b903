"""Mixers against other people's code, on weights and inputs stored with its outputs (tests/golden).

Weights come over by names, slices, concatenations and views; nothing is computed on the way.
"""

from pathlib import Path

import pytest
import torch
from golden_both import BOTH
from golden_delta import DELTA
from golden_outer import OUTER
from golden_routed import ROUTED

from riverrun.mixers import MIXERS, build
from riverrun.testing import golden
from riverrun.testing.golden import Golden

FOLDER = Path(__file__).parent / "golden"


def mamba(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": w["in_proj.weight"],
        "scan.conv.weight": w["conv1d.weight"][:, 0],
        "scan.conv.bias": w["conv1d.bias"],
        "scan.dt_bc.weight": w["x_proj.weight"],
        "scan.dt.weight": w["dt_proj.weight"],
        "scan.dt.bias": w["dt_proj.bias"],
        "scan.log_rate": w["A_log"],
        "scan.skip": w["D"],
        "out.weight": w["out_proj.weight"],
    }
    return parameters, (g.state["S"], g.state["conv"].mT[:, 1:])  # theirs keeps one input more than it reads


def mamba2(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": w["in_proj.weight"],
        "conv.weight": w["conv1d.weight"][:, 0],
        "conv.bias": w["conv1d.bias"],
        "dt_bias": w["dt_bias"],
        "log_rate": w["A_log"],
        "skip": w["D"],
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
    }
    return parameters, (g.state["S"].mT, g.state["conv"].mT[:, 1:])


def gated_deltanet(g: Golden):
    """Theirs interleaves [q, k, v, z] and [b, a] by key head; ours has each of them whole."""
    w, H, G = g.weights, g.args["num_heads"], g.args["num_key_heads"]
    K, V = g.args["key_width"], g.args["value_width"] * H // G
    q, k, v, z = w["in_proj_qkvz.weight"].unflatten(0, (G, -1)).split([K, K, V, V], 1)
    b, a = w["in_proj_ba.weight"].unflatten(0, (G, -1)).split(H // G, 1)
    parameters = {
        "inp.weight": torch.cat([p.flatten(0, 1) for p in (q, k, v, z, b, a)]),
        "conv.weight": w["conv1d.weight"][:, 0],
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
    }
    return parameters, (g.state["S"], g.state["conv"].mT[:, 1:])


def mlstm(g: Golden):
    w = g.weights
    names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
    parameters = {
        "inp.weight": torch.cat([w[f"{name}.weight"] for name in names]),
        "gate_bias": torch.cat([w["igate_preact.bias"], w["fgate_preact.bias"]]),
        "norm.weight": w["multihead_norm.weight"],
        "out.weight": w["out_proj.weight"],
    }
    return parameters, (g.state["C"], g.state["n"], g.state["m"][..., 0])


def rwkv7(g: Golden):
    w = g.weights
    parameters = {
        "mix": torch.cat([w[f"x_{i}"][0] for i in "rwkvag"]),
        "r.weight": w["r_proj.weight"],
        "k.weight": w["k_proj.weight"],
        "v.weight": w["v_proj.weight"],
        "decay.inp.weight": w["w_lora.lora.0.weight"],
        "decay.out.weight": w["w_lora.lora.2.weight"],
        "decay.out.bias": w["w_lora.lora.2.bias"],
        "rate.inp.weight": w["a_lora.lora.0.weight"],
        "rate.out.weight": w["a_lora.lora.2.weight"],
        "rate.out.bias": w["a_lora.lora.2.bias"],
        "gate.inp.weight": w["g_lora.lora.0.weight"],
        "gate.out.weight": w["g_lora.lora.2.weight"],
        "removal": w["k_k"],
        "replacement": w["k_a"],
        "bonus": w["r_k"],
        "norm.weight": w["g_norm.weight"],
        "norm.bias": w["g_norm.bias"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, (g.state["S"], g.state["last"])


def cell(g: Golden):
    w, P = g.weights, g.x.shape[-1]
    parameters = {
        "inp.weight": w["weight_ih_l0"],
        "inp.bias": w["bias_ih_l0"],
        "R": w["weight_hh_l0"].view(-1, 1, P, P),
        "c": w["bias_hh_l0"].view(-1, 1, P),
    }
    return parameters, tuple(g.state[name].transpose(0, 1) for name in sorted(g.state))


def mingru(g: Golden):
    parameters = {
        "inp.weight": g.weights["to_hidden_and_gate.weight"],
        "out.weight": g.weights["to_out.weight"],
    }
    return parameters, g.state["h"][:, 0]


MAPPINGS = {
    "gated_deltanet": gated_deltanet,
    "gru": cell,
    "lstm": cell,
    "mamba": mamba,
    "mamba2": mamba2,
    "mingru": mingru,
    "mlstm": mlstm,
    "rwkv7": rwkv7,
}
MAPPINGS |= DELTA
MAPPINGS |= OUTER | BOTH
MAPPINGS |= ROUTED


@pytest.mark.parametrize("name", MAPPINGS)
def test_golden(name):
    g = golden.load(FOLDER / MIXERS[name].golden)
    parameters, state = MAPPINGS[name](g)
    g.check(build(name, g.x.shape[-1], **g.args), parameters, state)


def test_every_row_has_golden_numbers_or_a_reason():
    files = {name for name, row in MIXERS.items() if row.golden.endswith(".safetensors")}
    assert files == set(MAPPINGS) == {path.stem for path in FOLDER.glob("*.safetensors")}
    assert all(len(row.golden) > 20 for name, row in MIXERS.items() if name not in files)


def test_golden_numbers_see_a_wrong_constant():
    g = golden.load(FOLDER / "mamba2.safetensors")
    parameters, _ = mamba2(g)
    mixer = build("mamba2", g.x.shape[-1], **g.args)
    mixer.norm.eps *= 100
    with pytest.raises(AssertionError, match="transformers"):
        g.check(mixer, parameters)


def test_files_are_small():
    assert all(path.stat().st_size < 100_000 for path in FOLDER.glob("*.safetensors"))
