"""Formats of files by their names: which hold rows, which are text, and which are neither.

Knows names alone; nothing is opened here.
"""

from __future__ import annotations

from pathlib import PurePath

COMPRESSED = (".gz", ".zst")
"""Suffixes after that of the format itself, as in `rows.jsonl.zst`."""
ROWS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".csv": "comma",
    ".tsv": "tab",
    ".parquet": "parquet",
}
"""What a file of rows is read as, by its suffix."""
_PROSE = "txt text md markdown mdx rst adoc asciidoc org tex bib log srt vtt po pot diff patch 1 2 3 4 5 6 7 8 9"
_SETTINGS = "toml ini cfg conf yaml yml properties env cmake mk make gradle bazel bzl nix dockerfile tf proto graphql thrift"
_CODE = (
    "py pyi pyx pxd c h cc cpp cxx hh hpp hxx cu cuh m mm java kt kts scala groovy cs fs fsx vb go rs swift js mjs cjs jsx ts tsx vue "
    "svelte css scss sass less php rb pl pm lua r jl hs lhs ml mli clj cljs erl ex exs elm dart zig nim d f f90 f95 for pas ada adb ads "
    "asm s lisp el scm rkt v sv vhd vhdl sh bash zsh fish bat ps1 sql awk sed tcl lean coq agda thy sol wat glsl hlsl j2 jinja jinja2"
)
TEXT = frozenset(f".{suffix}" for suffix in f"{_PROSE} {_SETTINGS} {_CODE}".split())
"""Suffixes of files that are stored as the text they hold, without a word."""
PERHAPS_ROWS = frozenset({".jl", ".txt"})
"""Suffixes of text that JSON lines often have too: whoever reads such a file looks into it first."""
_ARCHIVE = "an archive: unpack it and give the files in it"
_SHEET = "a spreadsheet: save it as .csv or .parquet"
_MARKUP = "markup, not plain text: convert it, or ask for its source with --as-text"
_BINARY_TABLE = "a binary table: save it as .parquet or .jsonl, or give the folder of a saved `datasets` data set"
_TENSORS = "numbers and no text"
_DOCUMENT = "a document and not plain text: convert it to .txt or .md"
_DATABASE = "a database: export a table of it as .parquet or .jsonl"
_MEDIA = "a picture, sound or film"
_PROGRAM = "a program"
_NOTEBOOK = "JSON that holds a notebook: convert it to .py or .md, or ask for its source with --as-text"
_KINDS = {
    _ARCHIVE: "zip tar tgz tbz2 txz bz2 xz 7z rar lz4 lz lzma br z cab iso jar whl egg deb rpm apk dmg warc arc zim",
    _SHEET: "xls xlsx xlsm xlsb ods numbers",
    _MARKUP: "html htm xhtml xht mht mhtml xml svg rss atom xsl sgml sgm tei",
    _BINARY_TABLE: "arrow feather ipc orc avro msgpack mds tfrecord tfrecords lance hdf5 h5 hdf rec idx",
    _TENSORS: "npy npz pt pth ckpt bin safetensors gguf ggml onnx mat zarr pkl pickle joblib dill",
    _DOCUMENT: "pdf ps eps djvu epub mobi azw azw3 doc docx docm odt odp ppt pptx rtf pages key eml msg mbox wpd",
    _DATABASE: "db sqlite sqlite3 duckdb mdb accdb rdb lmdb dbf",
    _MEDIA: "png jpg jpeg gif bmp tif tiff webp ico heic avif psd wav mp3 flac ogg opus m4a aac mp4 mkv avi mov webm ttf otf woff woff2",
    _PROGRAM: "exe dll so dylib o a lib obj class pyc pyo wasm",
    _NOTEBOOK: "ipynb",
}
NO_TEXT = {f".{suffix}": what for what, suffixes in _KINDS.items() for suffix in suffixes.split()}
"""Suffixes of formats that are no plain text, and what they are."""


def suffix_of(path: PurePath | str) -> str:
    """The suffix of a file's format in lower case, '' for none: of `Rows.JSONL.zst` it is `.jsonl`."""
    name = PurePath(path).name.lower()
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return PurePath(name).suffix


def compression_of(path: PurePath | str) -> str:
    """`.gz`, `.zst`, or '' for none."""
    suffix = PurePath(path).suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def holds_rows(path: PurePath | str) -> bool:
    """Whether a file is read row by row."""
    return suffix_of(path) in ROWS


def is_known(path: PurePath | str) -> bool:
    """Whether the name says what a file holds, so that it is no id of the hub."""
    suffix = suffix_of(path)
    is_version = suffix[1:].isdecimal()  # as in 'org/name-2.5'
    return bool(compression_of(path)) or suffix in ROWS or suffix in NO_TEXT or (suffix in TEXT and not is_version)
