"""Let torchvision import beside a CPU build of torch.

PyPI's torchvision for Linux is built for CUDA; beside a CPU torch its import fails with "operator torchvision::nms does
not exist", and with it the Qwen2.5-VL processor and qwen-vl-utils. Neither needs the operators, only their declaration.
A CPU build of torchvision (macOS, pytorch.org's index) brings them, and a second declaration would end the process.
`make` puts this module into the virtual environment of a CPU machine, with a .pth file that imports it in every
process (vLLM inspects models in a child). It costs nothing until torchvision is imported, and does nothing on CUDA.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared = []  # the library must outlive this module's import


def _loads(torch) -> bool:
    """Whether torchvision's own operators load beside this torch."""
    found = PathFinder.find_spec("torchvision")
    for folder in found.submodule_search_locations if found else ():
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except OSError:  # it wants CUDA's
                return False
            return True
    return False


class _BeforeTorchvision(MetaPathFinder):
    """Declares the missing operators at the first import of torchvision, then gets out of the way."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not _loads(torch):
                library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    library.define(name + _SCHEMA)
                _declared.append(library)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
