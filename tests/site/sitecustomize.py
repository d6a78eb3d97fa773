"""Python runs this where it starts, in the processes that tests start: training takes the speed of its CPU for granted
there, since timing a matrix product would take two seconds each time. tests/models/test_flops.py times one."""

import importlib.util
import sys

FLOPS = "encore.models.flops"


class Pretend:
    """Changes the module as it is imported, from wherever that is."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != FLOPS:
            return None
        sys.meta_path.remove(Pretend)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            module.measure_matmul = lambda *arguments: 1e12

        spec.loader.exec_module = execute_and_change
        return spec


if "stages.train" in sys.orig_argv:
    sys.meta_path.insert(0, Pretend)
