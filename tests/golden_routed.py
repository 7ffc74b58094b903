"""Weights of other people's mixtures of memories, by our names."""

import torch

from riverrun.testing.golden import Golden


def mom(g: Golden):
    """Theirs has one linear layer a memory and a part: k, v, b, a."""
    w, M = g.weights, g.args["num_memories"]
    parts = [[w[f"{part}_proj.{m}.weight"] for part in "kvba"] for m in range(M)]
    parameters = {
        "inp.weight": torch.cat([w["q_proj.weight"], w["g_proj.weight"]]),
        "router.weight": w["gate.weight"],
        "write.weight": torch.stack([torch.cat(part).T for part in parts]),
        "shared.weight": torch.cat([w[f"shared_{part}.weight"] for part in "kvba"]),
        "conv.weight": torch.cat([w[f"{part}_conv1d.weight"][:, 0] for part in "qkv"]),
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["o_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, None


ROUTED = {"mom": mom}
