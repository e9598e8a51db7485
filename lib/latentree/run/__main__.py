"""The command: python -m latentree.run NOTEBOOK --params FILE --out FOLDER."""

import sys

from latentree.run.execution import main

if __name__ == "__main__":
    sys.exit(main())
