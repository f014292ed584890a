"""The arithmetic: NF4 linears and batched deltas. Knows slots and rows, not names or versions."""
