"""All benchmarks in one run: python -m bench --full --out docs/benchmarks.md"""

from bench import generate, lora, lora_files, parity
from bench.common import run

if __name__ == "__main__":
    run(lambda options: "\n".join(program.main(options) for program in (parity, generate, lora, lora_files)))
