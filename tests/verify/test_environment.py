"""What an audit says of its checkpoint."""

from __future__ import annotations

import os

from runtime.parity.environment import checkpoint_hash


def test_a_weights_file_may_have_a_name_that_is_not_unicode(tmp_path):
    file, other = tmp_path / os.fsdecode(b"\xff.safetensors"), tmp_path / os.fsdecode(b"\xfe.safetensors")
    file.write_bytes(b"weights")
    other.write_bytes(b"weights")
    assert checkpoint_hash(tmp_path, [file]) != checkpoint_hash(tmp_path, [other])
