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


def xlstm(g: Golden):
    """Their norms keep their weights less one."""
    w = g.weights
    parameters = {
        "inp.weight": w["proj_up.weight"],
        "conv.weight": w["conv1d.conv.weight"][:, 0],
        "conv.bias": w["conv1d.conv.bias"],
        "qk.weight": torch.stack([w["q_proj.weight"], w["k_proj.weight"]]),
        "v.weight": w["v_proj.weight"][None],
        "gate.weight": torch.cat([w["mlstm_cell.igate.weight"], w["mlstm_cell.fgate.weight"]]),
        "gate.bias": torch.cat([w["mlstm_cell.igate.bias"], w["mlstm_cell.fgate.bias"]]),
        "norm.weight": 1 + w["mlstm_cell.outnorm.weight"],
        "skip": w["learnable_skip"],
        "out.weight": w["proj_down.weight"],
    }
    return parameters, None


def slstm_block(g: Golden):
    """Their layer hands fgate's output to the input gate, and igate's to the forget gate."""
    w, P = g.weights, g.x.shape[-1] // g.args["num_heads"]
    parameters = {
        "conv.weight": w["conv1d.conv.weight"][:, 0],
        "conv.bias": w["conv1d.conv.bias"],
        "gates.weight": torch.stack([w["fgate.weight"], w["igate.weight"]]),
        "values.weight": torch.stack([w["zgate.weight"], w["ogate.weight"]]),
        "R": w["slstm_cell._recurrent_kernel_"].unflatten(1, (4, P)).transpose(0, 1),
        "c": w["slstm_cell._bias_"].view(4, -1, P),
        "norm.weight": 1 + w["group_norm.weight"],
    }
    return parameters, None


OUTER = {f.__name__: f for f in (rwkv6, based, hgrn, gsa, lightnet, loglinear, xlstm, slstm_block)}
