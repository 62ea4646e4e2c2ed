"""The benchmarks of inference and files in one run: python -m bench --full --out docs/benchmarks.md

Programs of their own: bench.train, bench.emoji, bench.scaling, bench.lora --any-module, and bench.openvino (make bench-peers).
"""

from bench import generate, lora, lora_files, parity
from bench.common import run

if __name__ == "__main__":
    run(lambda options: "\n".join(program.main(options) for program in (parity, generate, lora, lora_files)))
