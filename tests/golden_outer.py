"""How other people's weights of the outer-product mixers become ours; for `test_golden`."""

import torch

from riverrun.testing.golden import Golden


def rwkv6(g: Golden):
    w = g.weights
    parameters = {
        "mix": torch.stack([w[f"time_maa_{i}"] for i in "xwkvrg"]),
        "low.weight": w["time_maa_w1"],
        "high": w["time_maa_w2"],
        "r.weight": w["receptance.weight"],
        "k.weight": w["key.weight"],
        "v.weight": w["value.weight"],
        "gate.weight": w["gate.weight"],
        "decay.inp.weight": w["time_decay_w1"],
        "decay.out.weight": w["time_decay_w2"],
        "decay.out.bias": w["time_decay"],
        "bonus": w["time_faaaa"],
        "norm.weight": w["ln_x.weight"],
        "norm.bias": w["ln_x.bias"],
        "out.weight": w["output.weight"],
    }
    return parameters, (g.state["S"], g.state["last"])


def based(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj.weight"] for i in "qkv"]),
        "out.weight": w["o_proj.weight"],
    }
    return parameters, None


def hgrn(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj.weight"] for i in "ifg"]),
        "norm.weight": w["g_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, g.state["h"]


def gsa(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj.weight"] for i in "qkvf"]),
        "norm.weight": w["g_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, (g.state["K"].mT, g.state["V"])


def lightnet(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj.weight"] for i in "qkv"]),
        "gate.inp.weight": w["g_proj.0.weight"],
        "gate.out.weight": w["g_proj.1.weight"],
        "norm.weight": w["g_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, (g.state["S"], g.state["z"], g.state["position"])


def loglinear(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": w["in_proj.weight"],
        "conv.weight": w["conv1d.weight"][:, 0],
        "conv.bias": w["conv1d.bias"],
        "dt_bias": w["dt_bias"],
        "log_rate": w["A_log"],
        "levels": w["L"],
        "skip": w["D"],
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
    }
    return parameters, None


OUTER = {f.__name__: f for f in (rwkv6, based, hgrn, gsa, lightnet, loglinear)}
