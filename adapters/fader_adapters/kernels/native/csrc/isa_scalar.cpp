#define FADER_ISA 0
#include "kernels.h"

FADER_EXPORT(fader_scalar);
