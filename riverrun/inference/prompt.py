"""Prompts for models whose memory is of fixed size: what is asked about is shown more than once."""

from __future__ import annotations


def reread(context: str, question: str, times: int = 2) -> str:
    """The question, the context `times` times, and the question again: a prompt to complete with the answer.

    A recurrent model chooses what to keep while it reads; at the second reading it knows what for. `times=1`
    is the plain prompt, context and question, without the question before it. Source: Arora et al. 2024
    (JRT-Prompt, arXiv:2407.05483), in the order of its evaluation code. Raises ValueError below 1.
    """
    if times < 1:
        raise ValueError(f"times = {times}; a context is read at least once")
    asked = f"{question} " if times > 1 else ""
    return asked + "\n".join([context] * times) + f" {question}"
