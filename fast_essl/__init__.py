"""fast_essl: Equivariant Self-Supervised Learning (Dangovski et al., ICLR 2022), pretrained fast."""

__version__ = "0.1.0"
