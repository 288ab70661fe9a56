"""Shorter autotuning of peers' Triton kernels. Must be called before their modules are imported."""
import math
import sys


def limit(few):
    """Every autotuner tries `few` configurations at most, spread over all of them."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def limited(self, fn, arg_names, configs, *rest, **named):
        if configs and len(configs) > few:
            configs = configs[:: math.ceil(len(configs) / few)]
        original(self, fn, arg_names, configs, *rest, **named)

    Autotuner.__init__ = limited


def compile_in_threads(threads):
    """Compiles the configurations of a kernel at the same time, before they are timed one after the other: same choice."""
    from concurrent.futures import ThreadPoolExecutor

    import triton
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.prune_configs
    pool = ThreadPoolExecutor(threads)

    def prepared(self, kwargs, *rest):
        configs = original(self, kwargs, *rest)
        if len(configs) > 1:
            try:
                # What does not compile is found again, and passed over, when it is timed.
                with triton.AsyncCompileMode(pool, ignore_errors=True):
                    for config in configs:
                        self.fn.run(*self.nargs.values(), **{**kwargs, "warmup": True, **config.all_kwargs()})
            except Exception as error:  # then the tuner compiles them itself, one after the other
                print(f"tuning: {type(error).__name__}: {error}", file=sys.stderr)
        return configs

    Autotuner.prune_configs = prepared
