// Which instructions this machine has, and the kernels that fit them.
#pragma once
#include <string>
#include <vector>

#include "kernel_table.h"

// Names of the kernel sets this machine can run, best first; empty without AVX2.
std::vector<std::string> supported_isas();

// Makes `name` the set all later calls use; "" means MOE_FORCE_ISA if set, else the best.
// Throws IsaMissing for an unknown name or one this machine cannot run.
void select_isa(const std::string& name);

// The selected kernels (selected as by select_isa("") on first use).
const KernelTable& kernels();
