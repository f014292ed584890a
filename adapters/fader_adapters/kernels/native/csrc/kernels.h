// The kernels of one instruction set as a table; the including file names the set and the table.
#pragma once
#include "attention.h"
#include "draw.h"
#include "experts.h"
#include "keep.h"
#include "lookup.h"
#include "map.h"
#include "norm.h"
#include "quant.h"
#include "selective.h"
#include "site.h"
#include "states.h"

#define FADER_EXPORT(NAME) \
    extern const Kernels NAME = {site, attention, quantise, dequantise, probe_read, probe_dot, norm, map, lookup, keep, experts, conv, \
                                 scan, selective, gated_norm, largest, draw, screen_packed, score}
