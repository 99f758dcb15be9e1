"""Eight medical sites, made from public packages."""
