"""Run as a file, not as a module: reads an adapter back with stock PEFT in a process that never imports peftfast.

``python reload.py INPUTS.pt ADAPTER OUTPUT.pt``: INPUTS.pt holds the batches, the encoder's directory and the number of labels
(see demo.py); OUTPUT.pt gets the logits of all rows, in order.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path


def main(inputs: str, adapter: str, output: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    here = Path(__file__).resolve().parent
    # Python puts this file's folder first on the path, where its neighbours could be taken for other modules.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]

    import torch
    from peft import PeftModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    specification = importlib.util.spec_from_file_location("demo_classifier", here / "classifier.py")
    assert specification is not None and specification.loader is not None
    classifier = importlib.util.module_from_spec(specification)
    sys.modules["demo_classifier"] = classifier
    specification.loader.exec_module(classifier)

    given = torch.load(inputs, weights_only=True)
    base = classifier.load(given["directory"], num_labels=given["num_labels"], quantised=True, device=given["device"])
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = [
            model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.cpu() for b in given["batches"]
        ]
    if "peftfast" in sys.modules:
        raise RuntimeError("peftfast was imported: the reload proves nothing")
    torch.save(torch.cat(logits), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
