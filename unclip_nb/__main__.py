"`python -m unclip_nb …` is the command `unclip …`. Written by hand, as `__init__.py` is."
from unclip_nb.cli import main

if __name__ == "__main__":
    main()
