"""The mark of tests on the real chat model: without its package they are reported as not run."""

import pytest

from lens_defense.loading.gguf import SMOLLM2_INSTALL, smollm2_file

needs_smollm2 = pytest.mark.skipif(
    smollm2_file() is None, reason=f"the real model's package is missing: {SMOLLM2_INSTALL}"
)
