"""What every test process needs before anything else."""

import os
from secrets import token_hex

# Ray clusters ask for a token. Without one in the environment, Ray makes one in the home directory: of several test
# processes that begin at the same time, each would make its own, and the last to write would win.
os.environ.setdefault("RAY_AUTH_TOKEN", token_hex(32))
