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


def sse(g: Golden):
    w = g.weights
    first = ["q_proj", "k_proj", "v_proj", "lora_q_proj.0", "lora_k_proj.0", "g_proj.0"]
    first += ["gk_proj.0.0", "gk_proj.1.0"]
    parameters = {
        "inp.weight": torch.cat([w[f"{name}.weight"] for name in first]),
        "query.weight": w["lora_q_proj.1.weight"],
        "key.weight": w["lora_k_proj.1.weight"],
        "gate.weight": w["g_proj.1.weight"],
        "decay.weight": w["gk_proj.0.1.weight"],
        "decay.bias": w["gk_proj.0.1.bias"],
        "decays.weight": w["gk_proj.1.1.weight"],
        "decays.bias": w["gk_proj.1.1.bias"],
        "router.weight": w["e_proj.weight"],
        "norm.weight": w["o_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    return parameters, None


ROUTED = {"mom": mom, "sse": sse}
