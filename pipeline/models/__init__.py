"""Language models: which there are (`presets`), loading them (`resolve`, `checkpoint`, `load`), capturing their keys and values
(`capture`) and measuring their geometry (`probe`). Knows no store; importing it loads neither torch nor transformers."""
