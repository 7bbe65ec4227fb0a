"""Launch target: ``accelerate launch -m hf_fasttrain RECIPE [section.key=value ...]``."""

from hf_fasttrain.cli import main

if __name__ == "__main__":
    main()
