// The page that opens a lab in the reader's own JupyterHub: it remembers the hub's address and makes the link.
(() => {
  const form = document.querySelector(".lossbook-hub");
  const hub = form.querySelector("#lossbook-hub-address");
  const path = form.querySelector("#lossbook-hub-path");
  const repository = form.dataset.repository;

  hub.value = localStorage.getItem("lossbook-hub") ?? "";
  const takePath = () => {
    if (location.hash.length > 1) path.value = decodeURIComponent(location.hash.slice(1));
    show();
  };

  function address() {
    const query = new URLSearchParams({
      repo: repository,
      branch: form.dataset.branch,
      urlpath: `lab/tree/${repository.split("/").pop()}/${path.value}`,
    });
    return `${hub.value.replace(/\/+$/, "")}/hub/user-redirect/git-pull?${query}`;
  }

  function show() {
    form.querySelector("output").textContent = hub.value && hub.checkValidity() ? address() : "";
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    localStorage.setItem("lossbook-hub", hub.value);
    location.assign(address());
  });
  addEventListener("hashchange", takePath);
  takePath();
})();
