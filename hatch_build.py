"""Build hook: compiles the CPU kernels into the package. Without a compiler it warns and the
package installs
pure; the library then reports why its fast path is missing."""

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("adapters", "fader_adapters", "kernels", "native")


def _load(path: Path) -> ModuleType:
    # by path: importing the package would need torch, which no build environment has
    spec = importlib.util.spec_from_file_location("fader_native_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeKernels(BuildHookInterface):
    """Wheels and editable installs carry the library; its presence makes the wheel platform-
    specific."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, then add the library to the wheel. `version` is hatchling's "standard" or
        "editable"."""
        del version
        if self.target_name != "wheel":
            return
        native = _load(Path(self.root) / NATIVE / "build.py")
        try:
            library = native.build()
        except native.BuildError as error:
            self.app.display_warning(
                f"CPU kernels not built, the slower fallbacks will run: {error}"
            )
            return
        build_data["artifacts"].append(f"/{(NATIVE / library.name).as_posix()}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
