// torch's CPU build has no device guard for CUDA, without which indexing refuses its tensors.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
