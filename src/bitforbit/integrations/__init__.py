"""bitforbit inside other libraries. What needs torch or transformers beyond the ops and modules lives here."""
