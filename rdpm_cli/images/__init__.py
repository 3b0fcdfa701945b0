"""Images in and out: sources, the ADM crop, PNG and npz writers, labelled grids, GIFs, curves."""
