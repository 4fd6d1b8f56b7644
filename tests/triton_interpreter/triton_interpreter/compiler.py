"""The compiler, which nobody calls: kernels are interpreted."""

from typing import Any

from triton.backends.compiler import BaseBackend


class Compiler(BaseBackend):
    """Compiles nothing."""

    supports_target = staticmethod(lambda target: target.backend == "cpu")

    def _not_called(self, *args: Any) -> Any:
        raise NotImplementedError("Set TRITON_INTERPRET=1: there is no compiler for this device.")

    hash = parse_options = add_stages = load_dialects = get_module_map = _not_called
