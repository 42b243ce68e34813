"""`python -m entroformer_lib` is `entroformer`; torchrun needs it."""

import sys

from entroformer_lib.cli import main

sys.exit(main())
