"""Put on the path of worker processes, it makes a process die when its model sees the token KVPIPE_TEST_FATAL_TOKEN.

As a broken driver or kernel would end it: in the middle of a forward pass, without an exception.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from types import ModuleType


class _Patched(importlib.abc.MetaPathFinder):
    """Finds the module of torch that has `Embedding`, and changes it once it is there."""

    def find_spec(self, fullname, path, _target=None):
        if fullname != "torch.nn.modules.sparse":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            forward = module.Embedding.forward

            def fatal(self, input_ids):
                token = os.environ.get("KVPIPE_TEST_FATAL_TOKEN")
                if token and bool((input_ids == int(token)).any()):
                    signal.raise_signal(signal.SIGSEGV)
                return forward(self, input_ids)

            module.Embedding.forward = fatal

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Patched())
