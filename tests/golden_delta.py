"""How weights of the delta family come over from other people's layouts; for `test_golden`."""

import torch

from riverrun.testing.golden import Golden


def conv(g: Golden, names: str) -> torch.Tensor:
    return torch.cat([g.weights[f"{i}_conv1d"] for i in names])[:, 0]


def comba(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj"] for i in "qkvgba"]),
        "conv.weight": conv(g, "qkv"),
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "feedback": w["decay"],
        "correction": w["D"],
        "norm.weight": w["o_norm"],
        "out.weight": w["o_proj"],
    }
    return parameters, (g.state["S"], g.state["conv"])


def deltaproduct(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj"] for i in "qkvgba"]),
        "conv.weight": conv(g, "qkv"),
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["o_norm"],
        "out.weight": w["o_proj"],
    }
    return parameters, (g.state["S"], g.state["conv"])


def kda(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat(
            [
                w[f"{i}.weight"]
                for i in ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj")
            ]
        ),
        "conv.weight": w["conv1d.weight"][:, 0],
        "decay.weight": w["forget_gate.f_b_proj.weight"],
        "log_rate": w["forget_gate.A_log"].flatten(),
        "dt_bias": w["forget_gate.dt_bias"],
        "gate.weight": w["g_b_proj.weight"],
        "norm.weight": w["o_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, (g.state["S"], g.state["conv"].mT[:, 1:])


def mesanet(g: Golden):
    w = g.weights
    parameters = {
        "inp.weight": torch.cat([w[f"{i}_proj"] for i in "qkv"]),
        "conv.weight": conv(g, "qk"),
        "rate.weight": torch.cat([w["a_proj"], w["b_proj"]]),
        "rate.bias": torch.cat([w["a_bias"], w["b_bias"]]),
        "ridge": w["lambda_params"].view(g.args["num_heads"], -1),
        "norm.weight": w["o_norm"],
        "out.weight": w["o_proj"],
    }
    return parameters, (g.state["kk"], g.state["kv"], g.state["conv"])


def mamba3(g: Golden):
    w, s = g.weights, g.state
    parameters = {
        "inp.weight": w["in_proj"],
        "dt_bias": w["dt_bias"],
        "norms.0.weight": w["B_norm"],
        "norms.1.weight": w["C_norm"],
        "biases": torch.stack([w["B_bias"], w["C_bias"]]).transpose(1, 2),
        "skip": w["D"],
        "out.weight": w["out_proj"],
    }
    if g.args["rank"] > 1:
        parameters["ranks"] = torch.stack([w[f"mimo_{i}"] for i in "xzo"]).transpose(1, 2)
    return parameters, (s["S"].mT, s["angle"], s["k"].transpose(1, 2), s["v"].transpose(1, 2))


DELTA = {f.__name__: f for f in (comba, deltaproduct, kda, mamba3, mesanet)}
