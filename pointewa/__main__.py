"""The command `pointewa`, also `python -m pointewa`."""

import runpy
import sys
from difflib import get_close_matches

from pointewa import __version__, tools

# Names on the command line, their modules in `pointewa.tools`, and what they are for.
COMMANDS = {
    "train": ("train", "train, fold and evaluate; resumes an unfinished run"),
    "eval": ("evaluate", "evaluate a trained model on its test split, or on another set"),
    "predict": ("predict", "classify clouds and meshes"),
    "fold": ("fold", "write the dense model of an EWA run"),
    "export": ("export", "write a model for others: ONNX, TorchScript, torch.export, Point-MAE"),
    "report": ("report", "draw the page of a finished run"),
    "compare": ("compare", "show finished runs side by side"),
    "visualize": ("visualize", "draw clouds, patches, saliency, mistakes and more"),
    "data": ("prepare_data", "inspect, verify, pack or download a data set"),
    "study": ("study", "train arms x seeds, and report the differences"),
    "few-shot": ("few_shot", "train few-shot folds of several arms, and report the table"),
    "forest": ("forest", "show the differences of several studies side by side"),
    "svm": ("svm", "fit a linear SVM to the features of a pre-trained model"),
    "theory": ("theory", "measure the statements about Eq. 6 beside the formulas"),
    "doctor": ("doctor", "say what is installed, used and found here"),
}


def main() -> None:
    """Run the command that the first argument names; the others are its own."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: pointewa COMMAND ...\n\nPoint-cloud transformers, and Experts Weights Averaging for any ViT.\n")
        print("\n".join(f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()))
        print("\npointewa COMMAND --help shows its arguments. First: pointewa train --config shapes")
        return
    if name in ("-V", "--version"):
        print(f"pointewa {__version__}")
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: pointewa {name}: there is no such command: {meant}", file=sys.stderr)
        sys.exit(2)
    tools.begin()
    sys.argv = [f"pointewa {name}", *rest]
    try:
        runpy.run_module(f"pointewa.tools.{COMMANDS[name][0]}", run_name="__main__")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "pointewa":
            raise
        print(f"error: {error.name} is not installed: pip install 'pointewa[train]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
