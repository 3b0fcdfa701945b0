from rdpm_cli.api import CodeStore as CodeStore
from rdpm_cli.api import Generator as Generator
from rdpm_cli.api import Tokenizer as Tokenizer
from rdpm_cli.api import load as load
from rdpm_cli.api import open_images as open_images

__version__: str
