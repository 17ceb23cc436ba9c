"""moe_runtime: private serving of Mixture-of-Experts language models.

The map of the house (README.md has the life of a request):

    server/   translates  HTTP <-> engine calls             imported as moe_runtime.server
    experts/  decides     which experts a scenario needs     imported as moe_runtime.experts
    engine    obeys       tokens in, tokens out              moe_runtime.engine, .scheduler, .models
    csrc/     computes    the CPU kernels                    moe_runtime._C, behind moe_runtime.kernels

This file imports nothing, so ``moe-serve --help`` answers at once.
"""

__version__ = "0.1.0"
