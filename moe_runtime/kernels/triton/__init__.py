"""The operations in Triton: one source that compiles for NVIDIA (sm_80, sm_90, sm_100) and AMD (gfx942) GPUs.

One file per operation: why it is as it is, the kernel, the function that checks, allocates and launches. Each
function means what its namesake in kernels/reference.py means, on contiguous float32 activations that all
live on one device. Nothing here waits for the device or looks at a value on it, so that any sequence of these
calls can be captured as a graph; an id, slot or position out of range therefore cannot raise, and each file
says what it does instead. Tile sizes are in tiles.py, argument checks in arguments.py; aot_case.py and each
file's ``AOT_CASES`` say how it is compiled where there is no GPU.

Knows nothing of models, batches or placement. Importing any file here needs triton, never a GPU. With
TRITON_INTERPRET=1, set before triton is imported, the same kernels run on CPU tensors, slowly.
"""
