"""What is in a store, as one plain record for people and scripts."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.drop import read_dropped, read_quarantined
from kvstore.gate import read_gate
from kvstore.manifest import Manifest
from kvstore.reader import Store
from kvstore.spec import format_layers


def describe(store: Store) -> dict[str, Any]:
    """Everything `kvpipe inspect` shows; sizes in bytes, fidelity as measured on the data written."""
    manifest, summary = store.manifest, store.samples.summary
    tokens = int(np.sum(summary["num_tokens"].to_numpy()))
    stored_bytes = int(np.sum(summary["stored_bytes"].to_numpy()))
    committed = len(summary)
    return {
        "path": store.location,
        "created": manifest.created,
        "kvpipe_version": manifest.kvpipe_version,
        "complete": committed == manifest.layout.num_shards and not manifest.is_growing,
        "shards": {"committed": committed, "planned": manifest.layout.num_shards},
        "samples": len(store),
        "tokens": tokens,
        "stored_bytes": stored_bytes,
        "bytes_per_token": stored_bytes / tokens if tokens else None,
        "bits_per_value": 8 * stored_bytes / (tokens * store.spec.values_per_token) if tokens else None,
        "layers": format_layers(store.spec.layer_numbers),
        "groups": [
            {
                "path": f"kv.zarr/{group.path}".rstrip("/"),
                "layers": format_layers(group.layers),
                "num_kv_heads": group.num_kv_heads,
                "key_dim": group.key_dim,
                "value_dim": group.value_dim,
                "codec": group.codec,
            }
            for group in manifest.groups
        ],
        "key_domain": store.spec.key_domain,
        "unrotated_layers": list(store.spec.unrotated_layers),
        "dtype": store.spec.dtype,
        "response_only": manifest.is_response_only,
        "chunk_tokens": manifest.layout.chunk_tokens,
        "shard_tokens": manifest.layout.shard_tokens,
        "alignment": manifest.alignment
        and {name: manifest.alignment[name] for name in ("layer_map", "layer_map_name", "baked")},
        "parts": manifest.data_parts,
        "dropped": len(read_dropped(store.storage)),
        "quarantined": read_quarantined(store.storage),
        "merged_from": _from_runs(manifest, "merged_from"),
        "recoded_from": _from_runs(manifest, "recoded_from"),
        "aligned_from": _from_runs(manifest, "aligned_from"),
        "gate": {when: result for when, result in read_gate(store.storage).items() if when in ("before", "after")},
        "fingerprints": {"signal": manifest.signal_fingerprint, "data": manifest.data_fingerprint},
        "fidelity": store.samples.fidelity() if committed else {},
    }


def _from_runs(manifest: Manifest, field: str) -> Any:
    """What the runs say of where the store comes from; None where it was extracted."""
    return next((run[field] for run in manifest.runs if field in run), None)
