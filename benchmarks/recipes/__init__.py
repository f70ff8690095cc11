"""How bundled assets were made."""
