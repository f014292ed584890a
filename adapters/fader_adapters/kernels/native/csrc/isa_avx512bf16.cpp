#define FADER_ISA 3
#include "kernels.h"

FADER_EXPORT(fader_avx512bf16);
