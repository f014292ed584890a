#define FADER_ISA 1
#include "kernels.h"

FADER_EXPORT(fader_avx2);
