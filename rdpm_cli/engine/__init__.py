"""The shared core: one function a subcommand, joining rooms, training loop and observers.

Every function checks what is cheap before what is slow, returns a `Result`, and prints nothing but progress.
torch is imported inside the functions, so that a wrong path, recipe or option is answered at once.
"""

from rdpm_cli.codes.work import Work
from rdpm_cli.engine.doctor import examine
from rdpm_cli.engine.drawing import Drawn
from rdpm_cli.engine.editing import ask as ask_edit
from rdpm_cli.engine.generator_training import train_gen
from rdpm_cli.engine.gpus import GPUS
from rdpm_cli.engine.inspection import inspect, resolve
from rdpm_cli.engine.judging import eval_judge, train_judge
from rdpm_cli.engine.planning import Hardware, plan_generator, plan_tokenizer
from rdpm_cli.engine.recon_scoring import eval_recon
from rdpm_cli.engine.reconstructing import reconstruct
from rdpm_cli.engine.reporting import make_report
from rdpm_cli.engine.runs import Result, copy_file, training_curves, versions
from rdpm_cli.engine.sample_options import ask_reject, key_values, parse_classes
from rdpm_cli.engine.sampling import Outputs, sample
from rdpm_cli.engine.scoring import Ruler, eval_fid, eval_images, eval_reference
from rdpm_cli.engine.tokenizer_training import train_tokenizer
from rdpm_cli.engine.tokenizing import StoreOptions, find_tokenizer, tokenize
from rdpm_cli.engine.tuning import tune_sampling
from rdpm_cli.engine.verifying import verify
from rdpm_cli.recipe_files import recipe_names

__all__ = [
    "GPUS",
    "Drawn",
    "Hardware",
    "Outputs",
    "Result",
    "Ruler",
    "StoreOptions",
    "Work",
    "ask_edit",
    "ask_reject",
    "copy_file",
    "eval_fid",
    "eval_images",
    "eval_judge",
    "eval_recon",
    "eval_reference",
    "examine",
    "find_tokenizer",
    "inspect",
    "key_values",
    "make_report",
    "parse_classes",
    "plan_generator",
    "plan_tokenizer",
    "recipe_names",
    "reconstruct",
    "resolve",
    "sample",
    "tokenize",
    "train_gen",
    "train_judge",
    "train_tokenizer",
    "training_curves",
    "tune_sampling",
    "verify",
    "versions",
]
