"""Where these kernels run: on CUDA devices, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1),
for tests."""

import triton

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
