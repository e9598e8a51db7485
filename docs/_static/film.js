/* A slider beneath every moving picture (animated WebP) of a page.

A reader who asked for less motion sees it stand still, at its last frame, until the button is
pressed. A browser that cannot take the picture apart (no ImageDecoder) shows it as it is, or for
such a reader its first frame. */
(() => {
  const less = matchMedia("(prefers-reduced-motion: reduce)");
  const pictures = 'img[src^="data:image/webp"], img[src$=".webp"]';

  function made(name, attributes, parent) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  }

  function canvasFor(image) {
    const film = document.createElement("div");
    film.className = "film";
    const size = { width: image.naturalWidth, height: image.naturalHeight };
    return made("canvas", { role: "img", "aria-label": image.alt, ...size }, film);
  }

  async function addSlider(image) {
    const data = await (await fetch(image.src)).arrayBuffer();
    const decoder = new ImageDecoder({ data, type: "image/webp" });
    await Promise.all([decoder.tracks.ready, decoder.completed]);
    const count = decoder.tracks.selectedTrack.frameCount;
    if (count < 2) return;
    const canvas = canvasFor(image), film = canvas.parentElement;
    const bar = made("div", {}, film);
    const button = made("button", { type: "button" }, bar);
    const slider = made("input", { type: "range", min: 1, max: count, "aria-label": "frame" }, bar);
    const told = made("output", {}, bar);
    let playing = false, timer, wanted;

    async function show(number) {
      slider.value = wanted = number;
      told.value = `${number} of ${count}`;
      const { image: frame } = await decoder.decode({ frameIndex: number - 1 });
      clearTimeout(timer);
      const next = () => show((number % count) + 1);
      if (playing && number === wanted) timer = setTimeout(next, frame.duration / 1000);
      if (number === wanted) canvas.getContext("2d").drawImage(frame, 0, 0);
      frame.close();
    }

    function play(on) {
      playing = on;
      button.textContent = on ? "Pause" : "Play";
      return show(Number(slider.value));
    }

    button.onclick = () => play(!playing);
    slider.oninput = () => play(false);
    slider.value = less.matches ? count : 1;
    await play(!less.matches);
    image.replaceWith(film);
  }

  function standStill(image) {
    const canvas = canvasFor(image);
    canvas.getContext("2d").drawImage(image, 0, 0);
    image.replaceWith(canvas.parentElement);
  }

  for (const image of document.querySelectorAll(pictures)) {
    const added = image.decode().then(() => addSlider(image));
    added.catch(() => less.matches && standStill(image));
  }
})();
