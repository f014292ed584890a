#define FADER_ISA 2
#include "kernels.h"

FADER_EXPORT(fader_avx512);
