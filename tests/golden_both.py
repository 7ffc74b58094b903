"""How weights of mixers that see both ways come over from their authors' layers; for tests/test_golden.py."""

import torch

from riverrun.testing.golden import Golden


def hydra(g: Golden):
    w = g.weights
    return {
        "inp.weight": w["in_proj.weight"],
        "conv.weight": w["conv1d.weight"],
        "conv.bias": w["conv1d.bias"],
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "skip.weight": w["fc_D.weight"],
        "skip.bias": w["D"],
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
    }, None


def vssd(g: Golden):
    w = g.weights
    return {
        "inp.weight": w["in_proj.weight"],
        "conv.weight": w["conv2d.weight"][:, 0],
        "conv.bias": w["conv2d.bias"],
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "skip": w["D"],
        "norm.weight": w["norm.weight"],
        "norm.bias": w["norm.bias"],
        "out.weight": w["out_proj.weight"],
    }, None


def efficientvim(g: Golden):
    w = g.weights
    return {
        "inp.weight": w["BCdt_proj.conv.weight"][..., 0],
        "conv.weight": w["dw.conv.weight"][:, 0],
        "mix.weight": w["hz_proj.conv.weight"][..., 0],
        "skip": w["D"],
        "out.weight": w["out_proj.conv.weight"][..., 0],
    }, None


def vig(g: Golden):
    w = g.weights
    return {
        "conv.weight": w["in_proj.0.weight"][:, 0],
        "inp.weight": torch.cat([w["qkv_proj.weight"], w["gk_proj.0.weight"]]),
        "decay.weight": w["gk_proj.1.weight"],
        "decay.bias": w["gk_proj.1.bias"],
        "gate.weight": w["g_proj.weight"],
        "gate.bias": w["g_proj.bias"],
        "norm.weight": w["g_norm.weight"],
        "local_norm.weight": w["l_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }, None


BOTH = {f.__name__: f for f in (efficientvim, hydra, vig, vssd)}
