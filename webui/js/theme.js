// Applies the stored theme before the first paint; a plain script, not a module.
{
  const stored = localStorage.getItem("theme");
  if (stored === "dark" || stored === "light") {
    document.documentElement.dataset.theme = stored;
  }
}
