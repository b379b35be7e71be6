"""python -m data_gen.storyworld: the arrays of the embedded world, or its tokenizer."""

import sys

from data_gen.storyworld import world

sys.exit(world.main(sys.argv))
