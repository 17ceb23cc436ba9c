// What this machine can do right now, with the selected instruction set and the threads of the pool: the bounds that a
// benchmark measures in the same minute as its kernel. A shared machine's bandwidth moves by half within an hour.
#pragma once
#include <cstdint>
#include <string>

// Bytes per second of reading [data, data + bytes) `passes` times from end to end.
double read_bandwidth(const char* data, int64_t bytes, int64_t passes);

// Operations per second (a multiply-add is two) of the arithmetic that multiplies weights of `kind`, out of registers,
// over about `seconds`; and the name of its instructions.
double matrix_peak(int32_t kind, double seconds);
std::string matrix_peak_name(int32_t kind);
